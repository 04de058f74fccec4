"""Where processes run: on this machine, or on a cluster that Ray manages. Nothing but this package imports ray."""
