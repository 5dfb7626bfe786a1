"""``codistill-launch``: n models from one command. A plan is made first, then shown or run."""
