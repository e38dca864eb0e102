"""The shell that every worker runs in, as a real process (here the tunnel manager's)."""

from tests.workers.harness import Stage


def test_the_last_reload_counts_though_the_reading_before_it_takes_longer(tmp_path):
    with Stage(tmp_path, "tunnel", TUNNEL_MODE="none", LEASE_TTL=4) as stage:
        stage.start()
        begun, over = tmp_path / "begun", tmp_path / "over"
        stage.write_config(TUNNEL_MODE="none", LEASE_TTL=4, TUNNEL_NAME="older")
        with stage.config.open("a") as file:
            file.write(f"touch {begun}; sleep 1; touch {over}\n")
        stage.hang_up()
        stage.until(begun.exists, what="the first reading")
        stage.reload(TUNNEL_MODE="none", LEASE_TTL=4, TUNNEL_NAME="newer")
        stage.until(over.exists, what="the end of the first reading")
        stage.until_fact(name="newer")
        told_s = stage.fact.at_s
        stage.until_fact(at_s=lambda at_s: at_s > told_s + 1.5)
        assert stage.fact.name == "newer"
