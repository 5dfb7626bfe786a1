"""The report of finished or running trainings, from their logs alone: ``codistill-report``."""
