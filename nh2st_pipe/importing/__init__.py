"""Features that other tools made, brought into a store: one module a tool, on shared parts."""
