"""From an `xinference launch` of Xinference 1.4.1 to settings of ours: pure functions over the words of a command line.

`words` and `command` take the line apart, `importing` finds what each part means here, and `document` writes it down.
Facts about Xinference (options, defaults, how it finds a model and GPUs) are from its wheel 1.4.1: deploy/cmdline.py,
core/supervisor.py, core/worker.py, model/llm/llm_family.py and model/llm/vllm/core.py. Those about vLLM's options are from
0.8.4 and 0.32.0. `tests/support/make_xinference_facts.py` made the two tables.

Of what Xinference hands vLLM unasked, trust_remote_code is carried over, for without it a model may not load at all;
block_size 16, swap_space 4 and max_num_seqs 256 are left to vLLM, which knows better for newer GPUs.
"""
