"""These programs have make targets of their own; some need packages that the suite does not have."""

collect_ignore_glob = ["*"]
