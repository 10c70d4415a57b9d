"""Commands on devices: boards by ssh, emulated boards, what runs there.

How a device is reached is in runtimes/ (`ssh*.py`, `emulator/`); this is what the commands do there.

    options.py           the options that say on which device a command works
    commands.py          `benchmark --device` and `verify --device`, and how a device is opened
    checks.py            `doctor --device` and `targets probe --device`
    fleet.py             several devices side by side
    emulated.py          emulated boards as devices of a command
    emulator_options.py  `edgepress emulator` as data
    emulator_command.py  `edgepress emulator`
    scenario_options.py  what the device runner can do beside latency: MLPerf scenarios, sweeps, energy, cores
    scenario_tables.py   what it measured then, as tables
    kernel_options.py    the options of `verify --kernels`
    kernel_replay.py     `verify --kernels`: every integer kernel on a device, bit for bit
    kernel_tables.py     what it answers
    end_to_end.py        the whole model on two machines, as far apart as equal forms are or farther
"""
