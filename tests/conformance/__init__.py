"""The conformance kit: checks the numbered clauses of docs/contract.md against a running device or receiver.

    python -m tests.conformance --broker HOST:PORT --device SITE/DEVICE [--samples] [--disturb] [--receiver ID]

It knows nothing of the agent but its contract and its schemas, and talks to it over MQTT alone.
"""
