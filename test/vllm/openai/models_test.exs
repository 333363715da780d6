defmodule VLLM.OpenAI.ModelsTest do
  use ExUnit.Case, async: true

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{Error, FakeEngine}
  alias VLLM.OpenAI.Models

  defp entries(engines) do
    {:ok, entries} = Models.entries(engines)
    entries
  end

  defp with_adapter(name) do
    llm = VLLM.Test.start!(script: "x", model: "with-adapter", enable_lora: true)
    :ok = VLLM.load_lora(llm, VLLM.lora_request!(name, "/adapters/#{name}"))
    llm
  end

  # Its worker never says which adapters it has.
  defp silent, do: FakeEngine.start!("ready", enable_lora: true)

  test "an engine that does not answer keeps nobody from another's adapters" do
    entries = entries([silent(), with_adapter("sql")])
    assert {:ok, entry, %{lora_name: "sql"}} = Models.find(entries, "sql", :infinity)
    assert entry == List.last(entries)
    assert {:error, %Error{reason: :timeout}} = Models.find(entries, "other", 50)
  end

  test "all engines are asked at once, and those that do not answer have their own names only" do
    silent = [silent(), silent()]
    entries = entries(silent)
    asking = spawn_link(fn -> Models.all(entries, :infinity) end)
    # Neither has answered when the other is asked.
    for llm <- silent, do: assert(eventually(fn -> FakeEngine.in_flight(llm) == 1 end))
    Process.unlink(asking)
    Process.exit(asking, :kill)
    assert [{"ready", _}, {"ready", _}] = Models.all(entries, 50)
  end

  test "an engine that has failed hides no adapter, and may have the name that no other has" do
    name = __MODULE__.Failed
    start_supervised!({FakeEngine, name: name, model: "refuse:out_of_memory", enable_lora: true})
    entries = entries([name, with_adapter("sql")])
    assert {:ok, _entry, %{lora_name: "sql"}} = Models.find(entries, "sql", :infinity)
    assert {:error, %Error{reason: :out_of_memory}} = Models.find(entries, "other", :infinity)
    names = for {name, about} <- Models.all(entries, :infinity), do: {name, about.parent}

    assert names == [
             {"refuse:out_of_memory", nil},
             {"with-adapter", nil},
             {"sql", "with-adapter"}
           ]
  end
end
