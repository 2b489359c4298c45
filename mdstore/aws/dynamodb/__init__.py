"""DynamoDB: calls, attribute values, and conditional writes."""
