-- Learn's memory as version 1 of the schema made it: what the upgrade starts from.

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
    is_trained     BOOLEAN NOT NULL
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

CREATE TABLE IF NOT EXISTS positions (
    topic       VARCHAR NOT NULL,
    part        INTEGER NOT NULL,
    next_offset BIGINT  NOT NULL,
    PRIMARY KEY (topic, part)
);

CREATE SEQUENCE IF NOT EXISTS outbox_sequence;

CREATE TABLE IF NOT EXISTS outbox (
    sequence BIGINT PRIMARY KEY DEFAULT nextval('outbox_sequence'),
    topic    VARCHAR NOT NULL,
    key      BLOB,
    value    BLOB,
    headers  VARCHAR NOT NULL        -- JSON: [[name, base64], …]
);
