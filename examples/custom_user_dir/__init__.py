"""A user-dir of one's own, with a task and a model that fairseq does not have; the line below lets them codistil.

fairseq takes one ``--user-dir``. It imports the modules in ``tasks`` and ``models`` by itself, and the task
``python_source`` becomes available as ``codistill_python_source`` too.
"""

import fairseq_codistill.tasks  # noqa: F401
