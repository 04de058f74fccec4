"""Arms x bases x seeds at one budget: plan, run, judge, report."""
