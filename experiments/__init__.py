"""One question per file: docstring (question, citation, the paper's number), runs, row, table, figure, claims.

Files here declare and the harness (`lab.harness.Experiment` says what it expects) runs them.
"""
