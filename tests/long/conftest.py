"""These programs have make targets of their own. Some need packages that the suite lacks."""

collect_ignore_glob = ["*"]
