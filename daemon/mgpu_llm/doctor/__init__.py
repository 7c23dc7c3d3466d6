"""What on this host would make a start over several GPUs fail, found before it is tried: one module a subject.

Nothing is changed, no GPU is used, and no engine is started. What is read from the host's files goes through `System`, so that
a folder of such files can stand in for another host.
"""
