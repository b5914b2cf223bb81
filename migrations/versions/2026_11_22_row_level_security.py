"""Row-level security on what belongs to somebody, and the roles of the API and the worker.

Every transaction of Chatkeep says on whose behalf it runs, in settings that end with it (`worker/database.py`): `chatkeep.role`,
`chatkeep.user_id`, `chatkeep.email`. The policies compare rows with these, so they are the same whether there is one role or three:

| table | a user (`chatkeep.user_id`) | the worker | the owner |
| --- | --- | --- | --- |
| `conversation`, `message` | reads the user's own | everything | everything |
| `user` | reads the user's own account and the one with `chatkeep.email`, makes one with that address | nothing | everything |
| `dead_letter` | nothing | everything | everything |
| `shard` | has nobody's data and no policy | | |

Nothing set is nobody: no row is seen and none can be written. FORCE makes the policies hold for the tables' owner too. Foreign keys are
checked without them, by Postgres itself.

| privilege on | `chatkeep_api` | `chatkeep_worker` |
| --- | --- | --- |
| `user` | SELECT, INSERT | |
| `conversation` | SELECT | SELECT, INSERT, UPDATE of all but its id, owner and origin |
| `message` | SELECT | SELECT, INSERT, DELETE |
| `dead_letter` | | everything |
| `shard` | SELECT, INSERT (a shard is noted down when it first numbers something) | SELECT, INSERT, UPDATE |

These two roles cannot log in. They are made here if the migrating role may make roles, and granted to it, so that an installation with
one login works with their privileges too. Where it may not, an administrator makes them first and grants them to the login; or there are
none, and the policies alone hold. To give the API and the worker logins of their own, with these rights and no others:

    CREATE ROLE my_api LOGIN PASSWORD '...' IN ROLE chatkeep_api;
    CREATE ROLE my_worker LOGIN PASSWORD '...' IN ROLE chatkeep_worker;

Whoever works by hand, as the owner, sees everything after `SET chatkeep.role = 'owner'`. So do the migrations (`migrations/env.py`).

Revision: row_level_security
Follows: first_tables
"""

from __future__ import annotations

from alembic import op

revision = "row_level_security"
down_revision = "first_tables"
branch_labels = None
depends_on = None

PROTECTED = ("user", "conversation", "message", "dead_letter")

# A sub-select is evaluated once for each statement, not for each row, and is no obstacle to an index.
_USER = "(SELECT nullif(current_setting('chatkeep.user_id', true), '')::bigint)"
_EMAIL = "(SELECT nullif(current_setting('chatkeep.email', true), ''))"
_ROLE = "(SELECT current_setting('chatkeep.role', true))"

_POLICIES = {
    "own_account": f'ON "user" FOR SELECT USING (id = {_USER} OR email = {_EMAIL})',
    "new_account": f'ON "user" FOR INSERT WITH CHECK (email = {_EMAIL})',
    "all_accounts": f"ON \"user\" FOR ALL USING ({_ROLE} = 'owner')",
    "own_conversations": f"ON conversation FOR SELECT USING (user_id = {_USER})",
    "all_conversations": f"ON conversation FOR ALL USING ({_ROLE} IN ('worker', 'owner'))",
    "own_messages": f"ON message FOR SELECT USING (user_id = {_USER})",
    "all_messages": f"ON message FOR ALL USING ({_ROLE} IN ('worker', 'owner'))",
    "all_dead_letters": f"ON dead_letter FOR ALL USING ({_ROLE} IN ('worker', 'owner'))",
}

# Roles belong to the server, tables to a database: another Chatkeep on this server may have made them, or be making them now. Before
# PostgreSQL 16 a member may always become the role, and there is no word for asking.
_MAKE_ROLES = """
DO $$
DECLARE
    name text;
    can_become text := CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END;
BEGIN
    FOREACH name IN ARRAY ARRAY['chatkeep_api', 'chatkeep_worker'] LOOP
        BEGIN
            IF to_regrole(name) IS NULL THEN
                EXECUTE 'CREATE ROLE ' || name || ' NOLOGIN';
            END IF;
        EXCEPTION
            WHEN insufficient_privilege THEN
                RAISE NOTICE USING MESSAGE = 'not permitted to make the role ' || name || '; the policies hold without it';
            WHEN duplicate_object OR unique_violation THEN
                NULL;
        END;
        BEGIN
            IF NOT pg_has_role(to_regrole(name), can_become) THEN
                EXECUTE 'GRANT ' || name || ' TO CURRENT_USER';
            END IF;
        EXCEPTION
            WHEN insufficient_privilege THEN
                RAISE NOTICE USING MESSAGE = 'not permitted to become ' || name || '; an administrator has to grant it';
            WHEN unique_violation THEN
                NULL;
        END;
    END LOOP;
END $$
"""

_GRANT = """
DO $$
BEGIN
    IF to_regrole('chatkeep_api') IS NOT NULL THEN
        GRANT SELECT, INSERT ON "user" TO chatkeep_api;
        GRANT SELECT ON conversation, message TO chatkeep_api;
        GRANT SELECT, INSERT ON shard TO chatkeep_api;
        IF NOT has_schema_privilege('chatkeep_api', current_schema(), 'USAGE') THEN
            EXECUTE 'GRANT USAGE ON SCHEMA ' || quote_ident(current_schema()) || ' TO chatkeep_api';
        END IF;
    END IF;
    IF to_regrole('chatkeep_worker') IS NOT NULL THEN
        GRANT SELECT, INSERT, UPDATE (title, updated_at, deleted_at) ON conversation TO chatkeep_worker;
        GRANT SELECT, INSERT, DELETE ON message TO chatkeep_worker;
        GRANT SELECT, INSERT, UPDATE, DELETE ON dead_letter TO chatkeep_worker;
        GRANT SELECT, INSERT, UPDATE ON shard TO chatkeep_worker;
        IF NOT has_schema_privilege('chatkeep_worker', current_schema(), 'USAGE') THEN
            EXECUTE 'GRANT USAGE ON SCHEMA ' || quote_ident(current_schema()) || ' TO chatkeep_worker';
        END IF;
        IF NOT has_database_privilege('chatkeep_worker', current_database(), 'TEMPORARY') THEN
            EXECUTE 'GRANT TEMPORARY ON DATABASE ' || quote_ident(current_database()) || ' TO chatkeep_worker';
        END IF;
    END IF;
END $$
"""

# The roles stay: they may be granted to logins, or serve another database, and they can do nothing here any more.
_REVOKE = """
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['chatkeep_api', 'chatkeep_worker'] LOOP
        IF to_regrole(name) IS NOT NULL THEN
            EXECUTE 'REVOKE ALL ON "user", conversation, message, dead_letter, shard FROM ' || name;
        END IF;
    END LOOP;
END $$
"""


def upgrade() -> None:
    for table in PROTECTED:
        op.execute(f'ALTER TABLE "{table}" ENABLE ROW LEVEL SECURITY')
        op.execute(f'ALTER TABLE "{table}" FORCE ROW LEVEL SECURITY')
    for name, definition in _POLICIES.items():
        op.execute(f"CREATE POLICY {name} {definition}")
    op.execute(_MAKE_ROLES)
    op.execute(_GRANT)


def downgrade() -> None:
    op.execute(_REVOKE)
    for name, definition in _POLICIES.items():
        op.execute(f"DROP POLICY {name} ON {definition.split()[1]}")
    for table in PROTECTED:
        op.execute(f'ALTER TABLE "{table}" NO FORCE ROW LEVEL SECURITY')
        op.execute(f'ALTER TABLE "{table}" DISABLE ROW LEVEL SECURITY')
