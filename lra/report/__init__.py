"""From records to tables, intervals, ties and figures."""
