defmodule VLLM.Real.ReplicasTest do
  # Replicas of a real engine that come, go and begin anew while it has requests.
  use ExUnit.Case

  import VLLM.RealEngine

  alias VLLM.Chaos.{Bank, Plan}
  alias VLLM.{Chaos, DemoModel, SystemEnv}

  @moduletag :slow
  @moduletag timeout: 1_800_000

  # What each replica is given. A machine may have no other memory node than the first, which can
  # be written in two ways.
  @own [{["0"], "first"}, {["00"], "second"}]

  test "that come, go and begin anew under load lose no request, each on devices of its own" do
    SystemEnv.put_tmp_dir()

    account =
      Chaos.load(
        [
          start: fn ->
            DemoModel.start!("demo",
              devices: for({devices, _name} <- @own, do: devices),
              # A process that puts its title in place of its environment would hide it.
              env: for({_, name} <- @own, do: %{"SPT_NOENV" => "1", "EX_VLLM_TEST_OWN" => name})
            )
          end,
          bank: Bank.demo(),
          plan: Plan.new(1, requests: 100, faults: 0, processes: 0, operations: 0, victims: []),
          callers: 4,
          rate: 10,
          timeout: 20 * patience(),
          patience: 60,
          memory: 16 * 1024 * 1024
        ],
        &operate(&1.llm)
      )

    # Every request was answered, and rightly; nothing is left.
    assert account.violations == []
    assert account.outcomes == %{answered: account.sent}
    assert account.sent >= 100
  end

  defp operate(llm) do
    assert_own(llm, 1)
    assert_own(llm, 2)

    second = processes(llm, 2)
    assert :ok = VLLM.scale(llm, 1, timeout: patience())
    assert gone?(second)
    assert states(llm) == [:ready]
    assert :ok = VLLM.scale(llm, 2)
    assert_own(llm, 2)

    first = processes(llm, 1)
    assert :ok = VLLM.drain(llm, 1, timeout: patience())
    assert gone?(first)
    assert states(llm) == [:drained, :ready]
    assert :ok = VLLM.restart(llm, 1)
    assert_own(llm, 1)

    second = processes(llm, 2)
    assert :ok = VLLM.restart(llm, 2, timeout: patience())
    assert gone?(second)
    assert states(llm) == [:ready, :ready]
    assert_own(llm, 2)
    %{}
  end

  defp states(llm), do: for(replica <- VLLM.replicas!(llm), do: replica.state)

  # vLLM's own process has them.
  defp assert_own(llm, replica) do
    {devices, name} = Enum.at(@own, replica - 1)
    environment = environment(processes(llm, replica)[:engine_core])
    assert environment["CPU_VISIBLE_MEMORY_NODES"] == Enum.join(devices, ",")
    assert environment["EX_VLLM_TEST_OWN"] == name
    assert Enum.at(VLLM.replicas!(llm), replica - 1).devices == devices
  end
end
