"""How the texts and questions of RULER are made; the task is in `tasks.ruler`."""
