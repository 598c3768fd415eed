"""The page of a run: facts read from its artifacts, a section a kind of step, bounded in pictures.

A section looks at one kind of step and returns plain values for the template; what is O(rows) is counted part by part
on the workers. Nothing is computed anew that a step has written down, and no times and no absolute paths get in, so
equal artifacts give equal bytes.
"""
