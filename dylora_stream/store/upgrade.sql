-- Version 1 to 2, in one transaction; tables that are new are schema.sql's. What was noted in Kafka beside version 1's offsets are sequence numbers, so these
-- are the marks of the messages that it left.

BEGIN;
ALTER TABLE outbox ADD COLUMN mark VARCHAR;
UPDATE outbox SET mark = sequence::VARCHAR;
ALTER TABLE rows ADD COLUMN answer VARCHAR;
ALTER TABLE positions ADD COLUMN stamp_ms BIGINT;
UPDATE schema_version SET version = 2;
COMMIT;
