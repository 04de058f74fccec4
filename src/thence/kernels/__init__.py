"""What a CPU does better in C than in many small tensor operations. Without a C compiler everything runs in torch."""
