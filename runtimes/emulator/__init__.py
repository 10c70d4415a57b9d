"""Emulated boards: the processor of a Pi or an Orin in QEMU's user mode, for outputs and instruction counts.

What runs here is the board's own kind of program on the board's own instruction set: wrong numbers, missing
instructions and the kernels that a runtime chooses show as they would there. How long it takes says nothing
about the board, so nothing here ever gives a time.

    boards.py     the boards: processor, features, caches
    debian.py     Debian packages fetched and unpacked without touching the host's own
    wheels.py     the runtime's packages for the board, unpacked once for each version
    install.py    all that is made once: the board's file system, the emulators, two small programs
    instance.py   one board that is switched on: namespaces with an ssh server, or a single process
    login.py      keys and configuration of a whole board's ssh server
    process.py    programs one by one, where namespaces are not allowed
    folders.py    the folders of boards that are on, and their locks
    users.py      the users of new namespaces
    enter.py      the program that becomes the board inside of new namespaces
    device.py     an emulated board as a `Device`
    counts.py     executed instructions by kind
    check.py      runs on a board and proves that it is the board that it says
    pin.c         starts the emulator with the processor that nobody can change
    insnmix.c     the emulator's plugin that counts instructions
"""
