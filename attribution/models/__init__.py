"""Models: what a family is, where its parts are, and how it is loaded and run.

The only room that knows model families (`families`, `anatomy`) and the only one that imports nnsight (`opening`,
`running`). Nothing here knows of prompts, neurons' scores or claims. Next: `engine`, which reads what a run computes.
"""
