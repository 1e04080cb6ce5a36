"""`python -m ftray.demo`: word counts over the standard library's source, exact while its processes are being killed.

The parts: `counting` (pure: what is counted), `job` (the program that uses ftray, and knows nothing of any kills),
`trace` (which attempt ran where and when), `killer` (SIGKILLs on a schedule), `report` (what is shown), `command`.
"""
