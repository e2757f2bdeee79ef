"""Dynamic sparse training: connections are dropped and others grown while the network trains."""
