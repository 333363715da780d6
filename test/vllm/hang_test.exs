defmodule VLLM.HangTest do
  # Workers that make no progress, by the fake worker under the real guard.
  use ExUnit.Case, async: true

  import VLLM.FakeEngine
  import VLLM.OSProcess

  alias VLLM.Error

  # Long enough for a busy machine to answer a ping, which takes it milliseconds.
  @timeout 2_500

  test "a worker that was stopped is killed, its requests are answered, and it comes back" do
    llm = start!("ready", hang_timeout: @timeout)
    [{_worker, program}] = workers(llm)
    fake = worker_pid(program)
    ask_in_background(llm, "hold")
    await_held(llm, 1)
    assert signal("STOP", fake)
    assert_receive {:answer, {:error, %Error{reason: :engine_dead} = error}}, 60_000
    assert error.message =~ "hung"
    assert error.message =~ "hang_timeout:"
    assert error.details["hung"] == "worker"
    refute alive?(fake)
    refute alive?(program.os_pid)
    assert {:ok, "again"} = ask(llm, "reply:again")
  end

  test "one whose pipe is full of requests meanwhile is killed as well" do
    llm = start!("ready", hang_timeout: @timeout)
    [{_worker, program}] = workers(llm)
    fake = worker_pid(program)
    assert signal("STOP", fake)
    prompt = "reply:" <> String.duplicate("x", 100_000)
    for _ <- 1..40, do: ask_in_background(llm, prompt)

    for _ <- 1..40 do
      assert_receive {:answer, {:error, %Error{reason: :engine_dead}}}, 60_000
    end

    refute alive?(fake)
    assert {:ok, "again"} = ask(llm, "reply:again")
  end

  test "a blocked event loop is found, with the last lines of the log" do
    llm = start!("ready", hang_timeout: @timeout)

    assert {:error, %Error{reason: :engine_dead} = error} =
             ask(llm, "print:about to sleep;sleep:600")

    assert error.details["hung"] == "worker"
    assert List.last(error.details["log"]) == "about to sleep"
    assert {:ok, "again"} = ask(llm, "reply:again")
  end

  test "an engine that stands still while its event loop answers is found" do
    llm = start!("ready", hang_timeout: @timeout)
    assert {:error, %Error{reason: :engine_dead} = error} = ask(llm, "stall")
    assert error.details["hung"] == "engine"
    assert error.details["unfinished"] == 1
    assert {:ok, "again"} = ask(llm, "reply:again")
  end

  test "the other replica serves on" do
    llm = start!("ready", hang_timeout: @timeout, replicas: 2)
    ask_in_background(llm, "stall")
    assert eventually(fn -> in_flight(llm) == 1 end)
    assert eventually(fn -> ask(llm, "reply:x") == {:ok, "x"} end)
    assert_receive {:answer, {:error, %Error{reason: :engine_dead}}}, 60_000
    assert {:ok, "again"} = ask(llm, "reply:again")
  end

  test "one long step is none, and neither are requests that wait in an engine that goes on" do
    llm = start!("ready", hang_timeout: @timeout)
    ask_in_background(llm, "slow")
    assert {:error, %Error{reason: :timeout}} = ask(llm, "hold", timeout: 2 * @timeout)
    refute_received {:answer, _}
    assert {:ok, _} = ask(llm, "release")
    assert_receive {:answer, {:ok, "released"}}
  end

  test "a long load is none" do
    start_supervised!(
      {VLLM.FakeEngine, name: LongLoad, model: "sleep:3;ready", hang_timeout: 400}
    )

    assert :ok = VLLM.await_ready(LongLoad)
    assert [{worker, _program}] = workers(LongLoad)
    assert {:ready, %{deaths: []}} = :sys.get_state(worker)
  end

  test "nothing is asked of a worker without requests" do
    llm = start!("ready", hang_timeout: 400)
    [{_worker, program}] = workers(llm)
    fake = worker_pid(program)
    assert signal("STOP", fake)
    refute eventually(fn -> not alive?(fake) end, 2_000)
    assert signal("CONT", fake)
    # On a busy machine the answer may take so long that it counts as a hang.
    assert eventually(fn -> ask(llm, "reply:x") == {:ok, "x"} end)
  end

  test "infinity turns it off" do
    llm = start!("ready", hang_timeout: :infinity)
    assert {:error, %Error{reason: :timeout}} = ask(llm, "stall", timeout: 500)
    assert {:ok, "x"} = ask(llm, "reply:x")
  end
end
