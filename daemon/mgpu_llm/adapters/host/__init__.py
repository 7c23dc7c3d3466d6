"""The host around the engine, as it is seen once an attempt has failed. Everything here blocks, and may for long."""
