"""One measurement, from the first batch to the report, in one or many processes."""
