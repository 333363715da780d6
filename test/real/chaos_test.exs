defmodule VLLM.Real.ChaosTest do
  # Load and faults at once on a real engine: a short run of what bench/chaos.exs does at length.
  use ExUnit.Case

  alias VLLM.Chaos.{Bank, Plan}
  alias VLLM.{Chaos, DemoModel, SystemEnv}

  @moduletag timeout: 1_800_000

  @tag :slow
  test "every request ends once and right while the engine's processes are killed and stopped" do
    SystemEnv.put_tmp_dir()

    account =
      Chaos.run(
        start: fn ->
          DemoModel.start!("demo",
            replicas: 2,
            max_restarts: 1000,
            max_seconds: 20,
            hang_timeout: 20_000
          )
        end,
        bank: Bank.demo(),
        plan:
          Plan.new(1,
            requests: 600,
            faults: 40,
            processes: 8,
            operations: 1,
            victims: [:worker, :guard, :engine_core]
          ),
        callers: 16,
        rate: 40,
        pause: 1000,
        hang: 40_000,
        timeout: 300_000,
        patience: 60,
        memory: 16 * 1024 * 1024,
        log: fn _ -> :ok end
      )

    assert account.violations == []
    assert account.sent >= 600
    assert length(account.hits) == 8
    for outcome <- [:answered, :deadline, :died, :left], do: assert(account.outcomes[outcome] > 0)
  end
end
