"""What a run costs: parameters, FLOPs, memory and a recipe's budget, planned without importing torch."""
