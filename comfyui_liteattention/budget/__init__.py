"""How much attention may be lost, at which step, and in which layer."""
