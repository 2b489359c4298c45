"""Fast signed DynamoDB calls: client, marshalling, retry. Knows nothing about requests or operations."""
