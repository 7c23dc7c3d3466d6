# Makes the template for one of several instances, mgpu-llm@NAME, of mgpu-llm.service: its own config, run-time and state directory. Caches
# are shared, so that a model is there once.
s|^Description=.*|& %i|
s|/etc/mgpu-llm/mgpu-llm\.toml|/etc/mgpu-llm/%i.toml|
s/^\(Runtime\|State\)Directory=mgpu-llm$/&@%i/
s|%[St]/mgpu-llm|&@%i|
