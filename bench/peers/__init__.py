"""Other engines on the same model and tokens, one file per contender.

A contender file says what it is and how it is asked; nothing heavy is imported before its functions
run, because they run in the contender's own process and environment (serve.py):

    KINDS          {kind: what the table calls it}
    ENVIRONMENT    environments.Environment, the pinned packages
    load(kind, model, threads)     an Engine: see serve.py
    convert(kind, model, target)   optional: writes what load() reads instead of the model, once;
                                   CONVERTER names another environment for it

compare.py runs them side by side, alternating with ours. torch_int4pack.py is one operator, timed
in the driver's own process by bench/run.py.
"""
