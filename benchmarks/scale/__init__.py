"""Results by Ray: one node against two, nodes that fail, memory, and what 1e9 training ids would cost."""
