defmodule VLLM.ChaosTest do
  # Load and faults at once, on the real supervision, guard and protocol around the fake worker.
  # bench/chaos.exs does the same to real engines, for longer.
  use ExUnit.Case

  alias VLLM.Chaos.{Bank, Plan}
  alias VLLM.{Chaos, FakeEngine, SystemEnv}

  @moduletag timeout: 300_000

  test "a seed gives the same plan again, and another one another" do
    options = [requests: 1000, faults: 100, processes: 40, operations: 4, victims: [:worker]]
    plan = Plan.new(7, options)
    assert length(plan.processes) == 40
    assert map_size(plan.callers) == 60
    assert Plan.new(7, options) == plan
    assert Plan.new(8, options) != plan
  end

  test "every request ends once and right while workers and guards are killed and stopped" do
    SystemEnv.put_tmp_dir()

    account =
      Chaos.run(
        start: fn ->
          FakeEngine.start!("ready",
            replicas: 2,
            max_restarts: 1000,
            max_seconds: 5,
            hang_timeout: 2000
          )
        end,
        bank: Bank.fake(),
        plan:
          Plan.new(1,
            requests: 2000,
            faults: 100,
            processes: 14,
            operations: 4,
            victims: [:worker, :guard]
          ),
        callers: 16,
        rate: 500,
        pause: 150,
        hang: 4000,
        timeout: 60_000,
        patience: 200,
        memory: 8 * 1024 * 1024,
        log: fn _ -> :ok end
      )

    assert account.violations == []
    assert account.sent >= 2000
    assert length(account.hits) == 14
    assert length(account.operations) == 4
    for outcome <- [:answered, :deadline, :died, :left], do: assert(account.outcomes[outcome] > 0)
  end
end
