defmodule VLLM.Real.HubTest do
  # Engines of models that are named as on the hub, with a hub on this machine.
  use ExUnit.Case

  import ExUnit.CaptureIO

  alias VLLM.{DemoModel, Error, HubServer, TestPython}

  @moduletag :slow
  @moduletag :tmp_dir
  @moduletag timeout: 600_000

  @gguf_models Path.expand("../../python/tests/gguf_models.py", __DIR__)

  setup %{tmp_dir: folder} do
    Application.put_env(:ex_vllm, :telemetry_listeners, test: self())
    on_exit(fn -> Application.delete_env(:ex_vllm, :telemetry_listeners) end)
    server = HubServer.start(folder)
    %{server: server, options: DemoModel.options() ++ [env: HubServer.env(server)]}
  end

  defp files(folder),
    do: for(name <- File.ls!(folder), into: %{}, do: {name, {:link, Path.join(folder, name)}})

  test "an engine that is stopped ends its download, and the next start goes on from there", %{
    server: server,
    options: options
  } do
    HubServer.put(server, "org/demo", files(DemoModel.path()))
    # In the headers, of which a plan is made, nothing goes wrong.
    stall = %{path: "safetensors", kind: "stall", after: 3_000_000}
    HubServer.set_faults(server, [stall])

    start_supervised!(
      {VLLM, [name: Stalled, model: "org/demo"] ++ Keyword.delete(options, :name)}
    )

    assert_receive {[:vllm, :load, :progress], _, %{phase: :download, bytes: b}}
                   when b > 3_000_000,
                   300_000

    assert [part] = Path.wildcard(Path.join(server.cache, "hub/models--org--demo/blobs/a8*"))
    assert Path.extname(part) == ".incomplete"
    assert VLLM.stop(Stalled) == :ok
    kept = File.stat!(part).size
    HubServer.set_faults(server, [])

    shown =
      capture_io(fn ->
        send(self(), {:llm, VLLM.llm!("org/demo", [progress: true] ++ options)})
      end)

    assert_received {:llm, llm}
    assert shown =~ ~r/demo: downloading .* of 8\.2 MB/
    assert HubServer.requests(server) =~ ~s("range": "bytes=#{kept}-)
    assert llm.model == "org/demo"
    assert VLLM.engine_info!(llm).model == "org/demo"
    assert DemoModel.wrong_facts(llm) == []
    VLLM.stop(llm)
  end

  test "what the hub refuses is the error of the start, and no token is in it", %{
    server: server,
    options: options
  } do
    HubServer.put(server, "org/gated", %{"config.json" => "{}"}, %{gated: "manual"})
    options = [hf_token: "hf_good_but_secret"] ++ options
    assert {:error, %Error{reason: :model_gated} = error} = VLLM.llm("org/gated", options)
    assert error.message =~ "https://huggingface.co/org/gated"
    refute inspect(error) =~ "but_secret"
    assert {:error, %Error{reason: :model_not_found}} = VLLM.llm("org/none", options)
  end

  test "a GGUF file is chosen and loaded, also while the hub is not there", %{
    server: server,
    options: options,
    tmp_dir: folder
  } do
    made = Path.join(folder, "made")

    {_, 0} =
      System.cmd(TestPython.executable!(), [@gguf_models, "Q4_K_M", made], stderr_to_stdout: true)

    file = {:link, Path.join(made, "demo-Q4_K_M.gguf")}

    HubServer.put(server, "org/demo-GGUF", %{"demo-Q4_K_M.gguf" => file, "demo-Q8_0.gguf" => file})

    path = VLLM.Hub.pull!("org/demo-GGUF", env: options[:env])
    assert Path.basename(path) == "demo-Q4_K_M.gguf"
    HubServer.set_faults(server, [%{path: "", status: 503}])
    llm = VLLM.llm!("org/demo-GGUF", options)
    assert %{model: "org/demo-GGUF", quantization: "gguf"} = VLLM.engine_info!(llm)
    assert DemoModel.wrong_facts(llm) == []
    VLLM.stop(llm)
  end
end
