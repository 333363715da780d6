defmodule VLLM.Engine.HangTest do
  use ExUnit.Case, async: true

  alias VLLM.Engine.Hang

  # What a run of `count` ticks comes to, with an answer to each ping by `answer`, which gets its
  # number and says what the engine has come to, or nil for silence.
  defp run(hang, count, in_flight \\ 1, answer) do
    Enum.reduce_while(1..count, {:ok, hang}, fn _tick, {:ok, hang} ->
      case Hang.tick(hang, in_flight) do
        {:idle, hang} -> {:cont, {:ok, hang}}
        {:ping, n, hang} -> {:cont, {:ok, answered(hang, n, answer.(n))}}
        {:hung, who} -> {:halt, {:hung, who}}
      end
    end)
  end

  defp answered(hang, _n, nil), do: hang

  defp answered(hang, n, {steps, beats, unfinished}) do
    pong = %{"n" => n, "steps" => steps, "beats" => beats, "unfinished" => unfinished}
    {:ok, hang} = Hang.pong(hang, pong)
    hang
  end

  test "a worker without requests is not asked" do
    assert {:ok, hang} = run(Hang.new(8_000), 100, 0, fn _ -> flunk("pinged") end)
    assert hang.asked == 0
  end

  test "a worker that is silent for the whole timeout hangs" do
    assert Hang.interval(Hang.new(8_000)) == 1_000
    assert {:ok, hang} = run(Hang.new(8_000), 8, fn _ -> nil end)
    assert {:hung, :worker} = Hang.tick(hang, 1)
    assert Hang.error(hang, :worker, ["last"]).message =~ "8000 ms"
    assert %{"hung" => "worker", "log" => ["last"]} = Hang.error(hang, :worker, ["last"]).details
  end

  test "an answer, however late, ends the silence" do
    {:ping, 1, hang} = Hang.tick(Hang.new(8_000), 1)
    {:ok, hang} = run(hang, 7, fn _ -> flunk("pinged twice") end)
    assert {:ok, _hang} = run(answered(hang, 1, {1, 1, 0}), 8, fn _ -> nil end)
  end

  test "a worker whose requests all ended meanwhile begins anew" do
    {:ok, hang} = run(Hang.new(8_000), 8, fn _ -> nil end)
    {:idle, hang} = Hang.tick(hang, 0)
    assert {:ok, _} = run(hang, 8, fn _ -> nil end)
  end

  test "an engine that stands still with unfinished requests hangs" do
    assert {:ok, hang} = run(Hang.new(8_000), 9, fn _ -> {5, 5, 2} end)
    assert {:hung, :engine} = Hang.tick(hang, 1)
    assert Hang.error(hang, :engine, []).message =~ "2 requests were unfinished"
  end

  test "an engine that has nothing unfinished does not" do
    assert {:ok, _} = run(Hang.new(8_000), 1_000, fn _ -> {5, 5, 0} end)
  end

  test "steps are progress, for ever" do
    assert {:ok, _} = run(Hang.new(8_000), 10_000, fn n -> {n, 0, 1} end)
  end

  test "beats are progress for a long time, and a loop that goes nowhere ends" do
    assert {:ok, hang} = run(Hang.new(8_000), 80, fn n -> {3, n, 1} end)
    assert {:hung, :engine} = run(hang, 10, fn n -> {3, n, 1} end)
    # Steps now and then are enough.
    assert {:ok, _} = run(Hang.new(8_000), 10_000, fn n -> {div(n, 50), n, 1} end)
  end

  test "what comes in place of figures is malformed" do
    assert {:malformed, _} = Hang.pong(Hang.new(8), %{"n" => 1})
    assert {:malformed, _} = Hang.pong(Hang.new(8), %{"n" => 1, "steps" => "x"})
  end

  test "infinity turns it off" do
    assert Hang.new(:infinity) == nil
  end
end
