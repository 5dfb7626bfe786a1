"""``codistill-relay``: forwards messages between jobs that can call out and not be called. It reads none of them."""
