-- Version 1 to 2, in one transaction. What was noted in Kafka beside version 1's offsets are sequence numbers, so these
-- are the marks of the messages that it left.

BEGIN;
ALTER TABLE outbox ADD COLUMN mark VARCHAR;
UPDATE outbox SET mark = sequence::VARCHAR;
UPDATE schema_version SET version = 2;
COMMIT;
