"""Claims: what a claim is, what is measured for it, and how a measurement becomes a verdict.

The claims themselves are in the tests of `test_faithfulness` and `test_knowledge`, each with its control and threshold.
`judge` has the statistics, `sample` the prompts that claims are judged on, `bench` the results that claims share, and
`measured` what a measurement returns. The measurements are in `about_methods`, `about_the_engine`, `about_models` and
`about_notebooks`, one module per subject.
"""
