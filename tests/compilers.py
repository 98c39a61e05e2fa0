"""What compiles in tests: torch's tracing alone; or all of torch.compile, which takes seconds a graph."""

from later import later

COMPILERS = ["aot_eager", *later("inductor")]
