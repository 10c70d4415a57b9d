"""Choosing by time, on this machine or a device, and probing a machine for its profile.

It times on a `Device` of runtimes/device.py; what operators took is kept by runtimes/timing_cache.py.

    stages.py           the stages of a compile that choose by time
    forms.py            each kind of operator once, in every form that it could take
    whole_model.py      what only the whole model decides: fusions, plans, session options
    local_benchmark.py  the compiled candidate against the untouched model
    device_planning.py  whether a device is the target at all, and the finished bundle tried there
    operator_models.py  one operator as a model of its own, in each of its forms
    operator_times.py   those models timed; what the timing cache knows costs nothing
    width_times.py      layers at other widths, for the search of widths
    probe.py            `targets probe --measure`
    probe_models.py     the operators that it times
    profile.py          timings for people, and as the kernels of a profile
    profile_file.py     a profile written to a file, whole or not at all
"""
