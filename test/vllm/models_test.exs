defmodule VLLM.ModelsTest do
  # The names themselves are tested in python/tests/test_models_registry.py.
  use ExUnit.Case, async: true

  import ExUnit.CaptureIO

  alias VLLM.{DemoModel, Error, HubServer, LoRARequest, Models, Options}
  alias VLLM.Hub.Progress
  alias VLLM.Models.Model

  @moduletag :tmp_dir

  setup %{tmp_dir: folder} do
    %{options: [env: %{"EX_VLLM_DATA" => folder, "HF_HOME" => Path.join(folder, "hf")}]}
  end

  test "a folder has a name, an alias and what is known of it", %{options: options} do
    path = DemoModel.path("demo-awq")

    assert {:ok, %Model{name: "demo:awq", label: "awq", path: ^path} = model} =
             Models.register(path, "demo", [label: "awq", base_model: "org/demo"] ++ options)

    assert %{kind: :model, origin: :local, method: "awq", bits: 4, missing?: false} = model
    assert %{base_model: "org/demo", quality: nil, made: nil, revisions: %{}} = model
    assert model.size == size(path)
    assert DateTime.diff(DateTime.utc_now(), model.registered_at) in 0..600
    assert :ok = Models.alias("demo:awq", "prod", options)

    assert {:ok, [%Model{name: "demo:awq", aliases: ["prod"]} = listed]} = Models.list(options)
    assert Models.get!("prod", options) == listed
    assert Models.delete!("demo", options) == 0

    assert File.exists?(Path.join(path, "config.json"))
  end

  test "what a job made is deleted with its files, unless an engine serves it", context do
    %{tmp_dir: folder, options: options} = context
    path = Path.join(folder, "models/llama/W4")
    File.mkdir_p!(Path.dirname(path))
    File.cp_r!(DemoModel.path("demo-awq"), path)
    assert %Model{origin: :made} = Models.register!(path, "llama", [label: "W4"] ++ options)
    llm = VLLM.Test.start!(model: "llama", script: "")
    assert {:error, %Error{reason: :in_use} = error} = Models.delete("llama:W4", options)
    assert error.details["engine_model"] == "llama"
    assert error.message =~ "force: true"

    assert Models.delete!("llama:W4", [force: true] ++ options) ==
             size(DemoModel.path("demo-awq"))

    refute File.exists?(path)
    :ok = VLLM.stop(llm)
  end

  test "what was quantized in place is listed and deleted", %{tmp_dir: folder, options: options} do
    path = Path.join(folder, "isq/4bit-1-2")
    File.mkdir_p!(Path.dirname(path))
    File.cp_r!(DemoModel.path("demo-awq"), path)

    of =
      ~s({"source": "/models/plain", "repository": null, "format": "awq", "word": "4bit", "at": 7})

    File.write!(Path.join(path, "quantize.json"), ~s({"of": #{of}}))
    assert {:ok, [%Model{name: "isq:4bit-1-2", origin: :isq} = model]} = Models.list(options)
    assert %{method: "awq", bits: 4, source: "/models/plain", made: %{"by" => "isq"}} = model
    assert Models.get!("isq", options) == model

    # It is in use where its lock is held, here by another program.
    lock = path <> ".lock"

    held =
      Port.open({:spawn_executable, "/usr/bin/flock"}, args: [lock, "sh", "-c", "echo; read _"])

    assert_receive {^held, {:data, _}}, 10_000
    assert {:error, %Error{reason: :in_use}} = Models.delete(model.name, options)
    Port.close(held)
    assert Models.delete!(model.name, [force: true] ++ options) == model.size
    refute File.exists?(path)
  end

  test "an adapter is uploaded with a card, and comes back as it was", context do
    %{tmp_dir: folder, options: [env: env]} = context
    server = HubServer.start(folder)
    options = [env: Map.merge(env, HubServer.env(server))]
    adapter = DemoModel.path("demo-lora")
    Models.register!(adapter, "facts", options)

    Application.put_env(:ex_vllm, :telemetry_listeners, [{self(), self()}])
    on_exit(fn -> Application.delete_env(:ex_vllm, :telemetry_listeners) end)
    about = %{model: "facts", repository: "me/facts"}
    token = [hf_token: "hf_good_secret"]

    {{:ok, url}, shown} =
      with_io(fn ->
        Models.push(
          "facts",
          "me/facts",
          [notify: {self(), :told}, progress: true] ++ token ++ options
        )
      end)

    assert url == server.endpoint <> "/me/facts"
    assert shown =~ ~r/\(100 %\), \d of \d files\n\z/
    size = size(adapter)
    assert_received {:told, %Progress{total_bytes: ^size}}
    uploaded = Path.join(server.folder, "me/facts")

    for name <- File.ls!(adapter) do
      assert File.read!(Path.join(uploaded, name)) == File.read!(Path.join(adapter, name))
    end

    assert File.read!(Path.join(uploaded, "README.md")) =~ "A LoRA adapter"
    refute shown =~ "hf_good"
    assert_received {[:vllm, :push, :start], %{system_time: _}, ^about}

    assert_received {[:vllm, :push, :progress], %{bytes: _, total_bytes: ^size, duration: _},
                     ^about}

    stop = Map.put(about, :url, url)
    assert_received {[:vllm, :push, :stop], %{duration: _}, ^stop}

    assert {:error, error} = Models.push("fact", "me/facts", token ++ options)
    failed = %{model: "fact", repository: "me/facts", error: error}
    assert_received {[:vllm, :push, :exception], %{duration: _}, ^failed}
  end

  test "what cannot be is refused without Python" do
    nowhere = [python: "/no/python"]

    for result <- [
          Models.get("", nowhere),
          Models.delete(nil, nowhere),
          Models.register("/models/x", :name, nowhere),
          Models.alias("a", "", nowhere),
          Models.delete("a", [force: 1] ++ nowhere),
          Models.list([lable: "x"] ++ nowhere),
          Models.push("a", "me/a", [privte: true] ++ nowhere),
          Models.push("a", nil, nowhere)
        ],
        do: assert({:error, %Error{reason: :invalid_option}} = result)

    assert_raise Error, fn -> Models.alias!("a", :b, nowhere) end
  end

  test "an adapter is named by its name alone" do
    assert {:ok, wire} = Options.check(:lora_request, :lora_request, "sql")

    assert {:ok, ^wire} =
             Options.check(:lora_request, :lora_request, LoRARequest.new("sql", "sql"))

    assert %{"lora_name" => "sql", "lora_path" => "sql"} = wire
    assert {:ok, request} = VLLM.lora_request("sql", "sql")
    assert request == LoRARequest.new("sql", "sql")

    assert {:error, %Error{reason: :invalid_option} = error} =
             Options.check(:lora_request, :lora_request, :sql)

    assert error.message =~ "an adapter from `VLLM.lora_request!/3`, or the name of one"
  end

  defp size(folder),
    do: folder |> File.ls!() |> Enum.map(&File.stat!(Path.join(folder, &1)).size) |> Enum.sum()
end
