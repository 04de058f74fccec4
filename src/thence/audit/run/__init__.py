"""Take real optimizer steps: your own step function, any program, or a stack through its adapter."""
