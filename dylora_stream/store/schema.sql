-- Learn's memory, version 2. A row is keyed by its position on the requests topic, so taking one twice changes nothing.

CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL);

CREATE TABLE IF NOT EXISTS rows (
    position       VARCHAR PRIMARY KEY,
    request_id     VARCHAR,
    tenant         VARCHAR NOT NULL,
    input          VARCHAR NOT NULL,
    output         VARCHAR,
    choices        VARCHAR[],
    reason         VARCHAR NOT NULL,
    time_ms        BIGINT  NOT NULL,
    is_correct     BOOLEAN,
    served_by      VARCHAR,
    served_version INTEGER NOT NULL,
    state          VARCHAR NOT NULL,
    features       FLOAT[] NOT NULL,
    sketch         FLOAT[],
    cluster_id     VARCHAR,
    expert_id      VARCHAR,
    is_trained     BOOLEAN NOT NULL,
    answer         VARCHAR           -- what was answered, as long as nobody has said whether that was right
);

CREATE TABLE IF NOT EXISTS clusters (
    cluster_id  VARCHAR PRIMARY KEY,
    skill_id    VARCHAR NOT NULL,
    tenant      VARCHAR NOT NULL,
    state       VARCHAR NOT NULL,
    created_ms  BIGINT  NOT NULL,
    rows_wanted INTEGER NOT NULL,
    rejections  INTEGER NOT NULL,
    expert_id   VARCHAR
);

CREATE TABLE IF NOT EXISTS jobs (
    job_id     VARCHAR PRIMARY KEY,
    kind       VARCHAR NOT NULL,
    tenant     VARCHAR NOT NULL,
    created_ms BIGINT  NOT NULL,
    positions  VARCHAR[] NOT NULL,   -- the exact rows, in training order
    state      VARCHAR NOT NULL,
    cluster_id VARCHAR,
    expert_id  VARCHAR,
    version    INTEGER NOT NULL,
    report     VARCHAR NOT NULL      -- JSON
);

CREATE TABLE IF NOT EXISTS versions (
    expert_id  VARCHAR NOT NULL,
    version    INTEGER NOT NULL,
    skill_id   VARCHAR NOT NULL,
    parent     INTEGER,
    maturity   VARCHAR NOT NULL,
    job_id     VARCHAR,
    manifest   VARCHAR NOT NULL,     -- JSON, as published
    PRIMARY KEY (expert_id, version)
);

CREATE TABLE IF NOT EXISTS registry (id INTEGER PRIMARY KEY, document VARCHAR NOT NULL);

CREATE TABLE IF NOT EXISTS era (id INTEGER PRIMARY KEY, number INTEGER NOT NULL);   -- of the requests topic

CREATE TABLE IF NOT EXISTS positions (
    topic       VARCHAR NOT NULL,
    part        INTEGER NOT NULL,
    next_offset BIGINT  NOT NULL,
    stamp_ms    BIGINT,              -- time of the record before it, by which a topic that was made anew is known
    PRIMARY KEY (topic, part)
);

CREATE TABLE IF NOT EXISTS late_answers (   -- whose row has not come yet
    target     VARCHAR PRIMARY KEY,
    tenant     VARCHAR NOT NULL,
    position   VARCHAR,
    request_id VARCHAR,
    output     VARCHAR NOT NULL,
    time_ms    BIGINT  NOT NULL
);

CREATE SEQUENCE IF NOT EXISTS outbox_sequence;

CREATE TABLE IF NOT EXISTS outbox (
    sequence BIGINT PRIMARY KEY DEFAULT nextval('outbox_sequence'),
    topic    VARCHAR NOT NULL,
    key      BLOB,
    value    BLOB,
    headers  VARCHAR NOT NULL,       -- JSON: [[name, base64], …]
    mark     VARCHAR NOT NULL        -- names this message of all that there are, see core.ledger.Ledger.outbox
);
