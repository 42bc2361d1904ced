"""Proof that the tests catch bugs: change the math in every small way, and see a test fail.

``python -m parity_tests.mutation`` (``make mutants``) changes one thing at a time in ``reference/``
and ``lorap/ops/``, runs the tests that name a rule, and prints per module how many of the changes
some test has caught. ``--help`` lists its options.

Why no tool from outside: mutmut, the only one of those judged (mutmut 3.8, cosmic-ray 8.7, poodle
1.3, mutatest 3.1) that forks from a process which has loaded torch already, names mutants by the
path of their file and cannot follow a folder that is imported under another name, as ``reference``
is; its list of operators is closed, and has neither axes nor the twins of calls (sum and mean,
floor and round, a matrix and its transpose). The others start a process per mutant, which here
takes longer than the test that kills it, and none checks that an explained survivor still is one.

===================  ============================================================
``generate.py``      mutants from the syntax tree
``written.toml``     bugs written by hand: misreadings of the paper
``equivalent.toml``  mutants that no test can tell from the original, and why
``mutants.py``       all of them together
``project.py``       which modules, which tests
``runner.py``        forks that run the tests against a mutant
``results.py``       what is kept on disk, and the table
===================  ============================================================
"""
