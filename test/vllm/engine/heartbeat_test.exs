defmodule VLLM.Engine.HeartbeatTest do
  use ExUnit.Case, async: true

  alias VLLM.Engine.Heartbeat

  # What a run of `count` ticks comes to, with an answer to each ping by `answer`, which gets its
  # number and says what the engine has come to, or nil for silence.
  defp run(heartbeat, count, in_flight \\ 1, answer) do
    Enum.reduce_while(1..count, {:ok, heartbeat}, fn _tick, {:ok, heartbeat} ->
      case Heartbeat.tick(heartbeat, in_flight) do
        {:idle, heartbeat} -> {:cont, {:ok, heartbeat}}
        {:ping, n, heartbeat} -> {:cont, {:ok, answered(heartbeat, n, answer.(n))}}
        {:hung, who} -> {:halt, {:hung, who}}
      end
    end)
  end

  defp answered(heartbeat, _n, nil), do: heartbeat

  defp answered(heartbeat, n, {steps, beats, unfinished}) do
    pong = %{"n" => n, "steps" => steps, "beats" => beats, "unfinished" => unfinished}
    {:ok, heartbeat} = Heartbeat.pong(heartbeat, pong)
    heartbeat
  end

  test "a worker without requests is not asked" do
    assert {:ok, heartbeat} = run(Heartbeat.new(8_000), 100, 0, fn _ -> flunk("pinged") end)
    assert heartbeat.asked == 0
  end

  test "a worker that is silent for the whole timeout hangs" do
    assert Heartbeat.interval(Heartbeat.new(8_000)) == 1_000
    assert {:ok, heartbeat} = run(Heartbeat.new(8_000), 8, fn _ -> nil end)
    assert {:hung, :worker} = Heartbeat.tick(heartbeat, 1)
    assert Heartbeat.error(heartbeat, :worker, ["last"]).message =~ "8000 ms"

    assert %{"hung" => "worker", "log" => ["last"]} =
             Heartbeat.error(heartbeat, :worker, ["last"]).details
  end

  test "an answer, however late, ends the silence" do
    {:ping, 1, heartbeat} = Heartbeat.tick(Heartbeat.new(8_000), 1)
    {:ok, heartbeat} = run(heartbeat, 7, fn _ -> flunk("pinged twice") end)
    assert {:ok, _heartbeat} = run(answered(heartbeat, 1, {1, 1, 0}), 8, fn _ -> nil end)
  end

  test "a worker whose requests all ended meanwhile begins anew" do
    {:ok, heartbeat} = run(Heartbeat.new(8_000), 8, fn _ -> nil end)
    {:idle, heartbeat} = Heartbeat.tick(heartbeat, 0)
    assert {:ok, _} = run(heartbeat, 8, fn _ -> nil end)
  end

  test "an engine that stands still with unfinished requests hangs" do
    assert {:ok, heartbeat} = run(Heartbeat.new(8_000), 9, fn _ -> {5, 5, 2} end)
    assert {:hung, :engine} = Heartbeat.tick(heartbeat, 1)
    assert Heartbeat.error(heartbeat, :engine, []).message =~ "2 requests were unfinished"
  end

  test "an engine that has nothing unfinished does not" do
    assert {:ok, _} = run(Heartbeat.new(8_000), 1_000, fn _ -> {5, 5, 0} end)
  end

  test "steps are progress, for ever" do
    assert {:ok, _} = run(Heartbeat.new(8_000), 10_000, fn n -> {n, 0, 1} end)
  end

  test "beats are progress for a long time, and a loop that goes nowhere ends" do
    assert {:ok, heartbeat} = run(Heartbeat.new(8_000), 80, fn n -> {3, n, 1} end)
    assert {:hung, :engine} = run(heartbeat, 10, fn n -> {3, n, 1} end)
    # Steps now and then are enough.
    assert {:ok, _} = run(Heartbeat.new(8_000), 10_000, fn n -> {div(n, 50), n, 1} end)
  end

  test "what comes in place of figures is malformed" do
    assert {:malformed, _} = Heartbeat.pong(Heartbeat.new(8), %{"n" => 1})
    assert {:malformed, _} = Heartbeat.pong(Heartbeat.new(8), %{"n" => 1, "steps" => "x"})
  end

  test "infinity turns it off" do
    assert Heartbeat.new(:infinity) == nil
  end
end
