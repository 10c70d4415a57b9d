"""What a user calls: the compile loop and the command line, over all that the other folders can do.

In folders of their own:

    devices/    commands on devices: boards by ssh, emulated boards, single kernels, scenarios
    history/    what is kept of runs: comparisons, gates, plots, result formats
    measuring/  choosing by time, and probing a machine for its profile

The compile loop:

    compile.py             the loop; its stages are in *_stage.py and measuring/stages.py
    candidate.py           one lowered form of the model: made, opened, held against the baseline
    data_sets.py           what ranges are calibrated on and what drift is measured on
    conditioning.py        float graphs readied for dynamic INT8; refining.py the same for static INT8
    observing.py           activation ranges; calib_cache.py keeps them in a file
    budget.py, search.py   the drift limit: what goes back to float
    typed_plan.py          16-bit floats; mixed_plan.py for what INT8 leaves in float
    pareto.py, result.py   what was measured on the way, and what a compile gives back
    bundling.py            the finished candidate as a bundle

The command line:

    cli.py                 words in, an answer out, exit codes; __main__.py and the script call it
    commands.py            every command as data, made of command_parts.py and the *_options.py
    options.py             the parsers, and the recipe that options make
    *_command.py           what one command does
    output.py, *_tables.py answers for people and programs; summary.py ends a compile
    reporter.py            progress and notes meanwhile
    opened.py              what the user named, opened to be run; input_shapes.py its shapes
    cache.py, workspace.py where edgepress keeps what it makes, for longer and for one compile
"""
