"""DynamoDB: its calls, attribute values and conditional writes."""
