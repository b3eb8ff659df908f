"""A fuzzer of the operators: valid and hostile calls, at every level of the machine.

    python -m tests.fuzz SEED COUNT [--workers N] [--isa NAME] [--sanitize] [--kind KIND]
    python -m tests.fuzz SEED COUNT --kind threads --tsan
    python -m tests.fuzz --replay SEED:INDEX [--set '{"heads": 1}']

A case is a *spec*, plain data that (seed, index) alone determine (`specs.py`). `build.py` makes the
tensors of its call, poisons every cell that nobody may read and puts tensors against pages that
must not be touched (`guard.py`); `mutations.py` damages one to three things of some. `run.py` makes
the call and judges the answer: `oracle.py` says in float64 what it must be and how far off it may
be, `rules.py` what a call must be refused for. Workers are processes that write down what they are
about to do, so that a death or a hang has a name (`workers.py`); `shrink.py` makes a failing spec
smaller.
"""
