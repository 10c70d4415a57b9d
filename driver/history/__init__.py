"""What is kept of runs and what is made of it: the history, comparisons, gates for CI, and result formats.

Each run leaves a row for everything that it timed, so that the next can be held against it.

    store.py      the SQLite file and its migrations
    rows.py       what is kept of a run: one row per timed thing, and the metrics with their units
    documents.py  from the document of a run, in any form that edgepress writes, to rows
    record.py     runs on their way in and out: after a command, from bundles and files, by name
    compare.py    two runs against each other, noise counted in
    gate.py       limits that a run is held to: `p90>+5%`
    tables.py     comparisons and gates as tables, documents, CSV records and JUnit cases
    plot.py       figures over runs: SVG, a page, lines for a terminal
    formats.py    any answer as CSV, JUnit or Markdown, on stdout or into a file
    after_run.py  what follows a benchmark: kept, compared, held to gates
    options.py    the options of all this, and `edgepress history` as data
    command.py    `edgepress history`
"""
