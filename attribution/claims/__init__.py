"""Claims: what is claimed, how it is measured, and how evidence becomes a verdict.

`judge` has the statistics, `bench` what the claims about one model share. One module for each subject of
`test_faithfulness` and `test_knowledge`, in `about_methods`, `about_the_engine`, `about_models`, `about_notebooks`.
"""
